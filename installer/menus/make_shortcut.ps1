# Optional, and not needed to start: puts Floe Chat into the Windows start menu.
#   powershell -ExecutionPolicy Bypass -File make_shortcut.ps1
$here = Split-Path -Parent $MyInvocation.MyCommand.Path
$installer = Split-Path -Parent $here
$root = Split-Path -Parent $installer
$start = Join-Path $installer 'double_click\Start Floe Chat.bat'
if (-not (Test-Path $start)) { $start = Join-Path $root 'Start Floe Chat.bat' }
$menu = [Environment]::GetFolderPath('Programs')
$link = (New-Object -ComObject WScript.Shell).CreateShortcut((Join-Path $menu 'Floe Chat.lnk'))
$link.TargetPath = $start
$link.WorkingDirectory = $root
$link.IconLocation = (Join-Path $root 'assets\icons\floechat.ico')
$link.Save()
Write-Host "Floe Chat is in the start menu."
