@echo off
rem Double-click this on Windows. It finds a Python and hands over to installer\bootstrap.py, which does the rest.
setlocal
title Floe Chat
set "ROOT=%~dp0"
if not exist "%ROOT%installer\bootstrap.py" set "ROOT=%~dp0..\..\"
if not exist "%ROOT%installer\bootstrap.py" goto notwhole
set "PYTHONHOME="
set "PYTHONPATH="
set "PYTHONNOUSERSITE=1"
set "PYTHONUTF8=1"

rem The Python of last time.
set "PY="
if not exist "%ROOT%.app\python-path" goto lookuv
set /p PY=<"%ROOT%.app\python-path"
if not defined PY goto lookuv
if exist "%PY%" goto run

rem The uv that came with the download, if its checksum is the one in the list, fetches a Python of its own.
:lookuv
set "PY="
set "UV=%ROOT%installer\bin\uv.exe"
if not exist "%UV%" goto system
set "SUM=%TEMP%\floechat-uv-%RANDOM%.txt"
certutil -hashfile "%UV%" SHA256 > "%SUM%"
findstr /i /g:"%SUM%" "%ROOT%installer\pins\uv.sha256" > nul
if errorlevel 1 goto changed
del "%SUM%"
set "UV_PYTHON_INSTALL_DIR=%ROOT%.app\python"
set "UV_CACHE_DIR=%ROOT%.app\cache\uv"
echo Fetching Python (about 30 MB) ...
"%UV%" python install --no-bin --quiet 3.12
if errorlevel 1 goto system
for /f "delims=" %%P in ('call "%UV%" python find --managed-python 3.12') do set "PY=%%P"
if not defined PY goto system
if exist "%PY%" goto run

rem A Python that is installed already. bootstrap.py itself refuses one that is too old.
:system
set "PY="
py -3 -I -c "import venv, ensurepip" > nul 2> nul
if errorlevel 1 goto plain
py -3 -I "%ROOT%installer\bootstrap.py" %*
goto done
:plain
python -I -c "import venv, ensurepip" > nul 2> nul
if errorlevel 1 goto nopython
python -I "%ROOT%installer\bootstrap.py" %*
goto done

:run
"%PY%" -I "%ROOT%installer\bootstrap.py" %*
:done
exit /b %errorlevel%

:notwhole
echo This file needs the folder it came with. Extract the whole zip first, then start it from there.
goto failed
:changed
del "%SUM%"
echo installer\bin\uv.exe is not the one this release was made with. Download Floe Chat again.
goto failed
:nopython
echo Floe Chat needs Python 3.11 to 3.14. Install it from python.org, or download the Floe Chat zip for Windows.
:failed
pause
exit /b 3
